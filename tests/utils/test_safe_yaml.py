"""Reading YAML of unknown origin: bounds, and the one line of text that says what is wrong."""

import pytest
import yaml

from dat.utils.safe_yaml import MOST_CHARACTERS, MOST_NODES, parse_yaml, read_yaml

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9))


@pytest.mark.parametrize("strings", [True, False])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, f"more than {MOST_NODES} values"),
        (MERGES, f"more than {MOST_NODES} values"),
        ("[" * 2000 + "]" * 2000, "nested more than"),
        ("- " * 2000 + "1", "nested more than"),
        ("a: &a [*a]", "alias a stands inside its own value"),
        ("a: 1\nb: 2\na: 3", "key 'a' is used twice.*line 3"),
        (f"a: '{'b' * MOST_CHARACTERS}'", f"more than {MOST_CHARACTERS} characters"),
        ("a: [1", "line 1"),
        ("a: *b", "undefined alias"),
        ("{[1]: 2}", "unhashable"),
    ],
)
def test_hostile_documents_are_refused_in_one_line(text, message, strings):
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text, strings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    ["9" * 5000, "0x" + "f" * 5000, "1" + ":59" * 1000, "1" + ":59" * 1000 + ".5", "2024-13-01", "!!int ''", "!!bool a",
     "!!timestamp a", "!!float ''", "!!python/object/apply:os.getcwd []"],
)  # fmt: skip
def test_hostile_values_are_refused_in_one_line(value):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        parse_yaml(f"a: {value}")
    assert type(caught.value) is ValueError


def test_plain_documents_read_as_pyyaml_does(tmp_path):
    text = "a: &a {b: [1, 2.5, no, null, 2024-01-01]}\nc: [*a, *a]\nd: {<<: *a, e: x}\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml(text, strings=True) == yaml.load(text, yaml.BaseLoader)
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8-sig")
    assert read_yaml(tmp_path / "a.yaml") == yaml.safe_load(text)

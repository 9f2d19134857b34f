"""The first tensor that is not finite is the one that is named."""

import pytest
import torch
from torch import nn

from dat.utils.errors import NonFiniteError
from dat.utils.finite import check_finite, trace_non_finite


def test_the_first_is_named_with_its_counts():
    bad = torch.tensor([[1.0, float("nan")], [float("inf"), -float("inf")]])
    named = [("a", torch.ones(2)), ("labels", torch.tensor([1])), ("b", bad), ("c", bad)]
    with pytest.raises(
        NonFiniteError, match=r"step 3: first non-finite tensor is b \(2, 2\): 1 NaN and 2 infinite of 4"
    ):
        check_finite(named, "step 3")
    check_finite(named[:2], "step 3")


class Log(nn.Module):
    def forward(self, x):
        return {"y": [x, torch.log(x)]}


def test_the_first_module_whose_output_breaks_is_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.log, self.last = nn.Identity(), Log(), nn.Linear(2, 2)

        def forward(self, x):
            return self.last(self.log(self.first(x))["y"][1])

    model = Model()
    with pytest.raises(NonFiniteError, match=r"step 1: first non-finite tensor is output of log\['y'\]\[1\] \(1, 2\)"):
        trace_non_finite(model, lambda: model(torch.tensor([[-1.0, 1.0]])), "step 1")
    trace_non_finite(model, lambda: model(torch.ones(1, 2)), "step 1")
    with torch.no_grad():
        model.last.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 1, parameters: first non-finite tensor is last.bias"):
        trace_non_finite(model, lambda: model(torch.ones(1, 2)), "step 1")
    assert not model.log._forward_hooks

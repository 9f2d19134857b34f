"""Runs commands in the process of a test."""

from dat.cli import parse


def dat(*arguments):
    """`dat ARGUMENTS`, whose errors are raised instead of printed."""
    function, options = parse([str(argument) for argument in arguments])
    return function(options)

"""Recipes of classification; the library is dat.classification."""

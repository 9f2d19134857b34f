"""Image classifiers of any timm model: training, evaluation, prediction and export."""

from dat.classification.classifier import Classifier, Prediction

__all__ = ["Classifier", "Prediction"]

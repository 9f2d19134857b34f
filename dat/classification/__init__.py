"""Training, evaluating and using image classifiers: folders or tars of pictures, any timm model."""

"""Training and configuration for all tasks. Needs the training extras; `import dat` does not load it."""

"""What classification and detection training share. Needs the training extras; `import dat` does not load it."""

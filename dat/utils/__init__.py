"""Small general helpers: errors, files, images, plots."""

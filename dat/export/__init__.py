"""What the commands that leave training behind share: exported models, pictures and videos to predict on."""

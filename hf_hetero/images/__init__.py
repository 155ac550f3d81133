"""The room of models that see images: rows with images, kept whole until their features are cut to a rank's tokens."""

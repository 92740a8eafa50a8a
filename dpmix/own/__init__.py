"""Your own images: check, train, report. See book/own_images.md."""

"""Image files to pixels, and lists of images."""

"""Video and sound files: reading, writing, listing, and HTML pages that show them."""

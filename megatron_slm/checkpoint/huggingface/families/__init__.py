"""Model families: settings and tensor names of one architecture per module."""

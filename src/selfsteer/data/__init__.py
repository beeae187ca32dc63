"""Records, files and the one reader of foreign rows."""

"""Command lines, one file each. They parse and print; everything else is the library's."""

"""The helpers of this folder are imported by its subfolders' tests: pytest puts it on the path."""

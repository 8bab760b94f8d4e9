"""TODO"""
if __name__ == "kernels":  # found by its folder, not as the installed package
    raise ImportError("'kernels' is installed as txcore.kernels: write 'import txcore.kernels'")

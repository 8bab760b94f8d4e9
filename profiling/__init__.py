"""TODO"""
if __name__ == "profiling":  # found by its folder, not as the installed package
    raise ImportError("'profiling' is installed as txcore.profiling: write 'import txcore.profiling'")

"""``python -m condconv_surgery`` is the command ``condconv``."""

from condconv_surgery.cli.main import run

if __name__ == "__main__":
    run()

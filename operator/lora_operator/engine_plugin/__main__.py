"""`python3 <the folder with this file and the package lora_operator_plugin>` is the launcher.

So the package is found without PYTHONPATH, which an image may need for itself, and none of its files' folder is on the path.
"""

from lora_operator_plugin.launcher import main  # type: ignore[import-not-found]

if __name__ == "__main__":
    main()

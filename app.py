"""The web app's front door: `python app.py` is `multilora app`."""

from multilora.cli import main

if __name__ == "__main__":  # the worker process imports this file again
    import sys

    sys.argv[1:1] = ["app"]
    main()

"""`python -m utils.inspect_datastore`: see `utils/datastore/inspect.py`."""

from utils.cli import run_script
from utils.datastore.inspect import main as main
from utils.datastore.inspect import parse_args as parse_args

if __name__ == "__main__":
    run_script(main)

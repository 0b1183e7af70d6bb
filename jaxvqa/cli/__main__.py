import sys

from jaxvqa.cli import main

sys.exit(main())

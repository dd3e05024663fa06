"""From an upload to the arrays and pictures that the tabs show."""

"""One file a tab, each with a `TITLE` and `build(context)`."""

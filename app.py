"""Serves the app on http://127.0.0.1:7860:

    python app.py

GRADIO_SERVER_NAME and GRADIO_SERVER_PORT choose another address.
"""

from app.ui import LAUNCH, build

if __name__ == "__main__":
    build().launch(**LAUNCH)

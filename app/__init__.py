"""The Gradio app. A file goes through `images` and `models` to `draw` and the explorer; `ui` joins the tabs."""

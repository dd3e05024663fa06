"""The Gradio app. `runtime` turns a file into arrays and pictures, `tabs` shows them, `ui` joins the tabs."""

"""The web page: drop a video, hear it; made with gradio (the extra `web`)."""

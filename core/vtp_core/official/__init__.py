"""The VTP release's directories (github.com/MiniMax-AI/VTP): ``config.json`` and ``model.safetensors``.

Such a directory is a RUN everywhere: the layout is specs/vtp.md 1.10 and 2, nothing in it is run as code.
"""

"""What a recorded history looks like: figures, the HTML page, and what W&B is sent."""

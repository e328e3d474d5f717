"""The demonstration model of deploy/demo-model: its data, its training, its scores."""

"""What a study needs: data, networks, a training loop, metrics and tasks."""

"""Base models: loaded, adapted, trained, saved and read back."""

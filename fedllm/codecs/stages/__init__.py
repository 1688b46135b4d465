"""The stages of which codecs are put together."""

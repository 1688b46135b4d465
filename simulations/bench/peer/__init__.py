"""What benchmarks compare with: a task as an ordinary Flower user writes it, and EDEN by its paper.

The app is stock FedAvg, whose client loads its model, in the shape of Flower's own Hugging Face quickstart.
Nothing of fedllm is used.
"""

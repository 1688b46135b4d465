"""The benchmark's work as an ordinary Flower user writes it: stock FedAvg, a ClientApp that loads its model.

The shape is that of Flower's own Hugging Face quickstart; nothing of fedllm is used.
"""

"""The fused model as transformers knows it, and fusing from folder to folder."""

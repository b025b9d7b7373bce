"""Healing: a short distillation of a fused model from its base, through transformers' Trainer."""

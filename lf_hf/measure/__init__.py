"""What is measured on a model: whether it fuses, its predictions, similarity and speed, the memory that it takes."""

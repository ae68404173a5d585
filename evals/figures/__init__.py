"""What a trained model's gates and memories do on texts, and how that goes with what it recalls."""

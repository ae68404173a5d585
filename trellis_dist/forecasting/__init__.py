"""How forecasters are trained and scored: series in, windows, a small loop, MSE and MAE out."""

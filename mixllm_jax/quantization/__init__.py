"""Post-training quantisation: salience, allocation, GPTQ and the driver that streams blocks through them."""

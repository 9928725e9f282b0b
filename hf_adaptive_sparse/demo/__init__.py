"""The bundled tiny vision-language model: data generator, training script and checkpoint."""

"""What things cost: a checkpoint or a training configuration goes in, tables of speed, memory and quality come out."""

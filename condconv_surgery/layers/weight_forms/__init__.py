"""What a conditional layer makes of its weight before it is mixed: standardised, or read from int8 or bfloat16."""

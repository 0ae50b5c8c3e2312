"""Numbers, sizes and times in words, and a checkpoint as HTML; knows neither folders nor meta."""

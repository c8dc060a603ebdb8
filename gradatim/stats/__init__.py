"""Sequential statistics for decisions that are looked at after every observation. numpy only; knows no records."""

package main

func writeChart(file string, p plan, results samples) error { return nil }

"""A text of more than 256 tokens, English and Python, written for these tests."""

TEXT = '''The tide tables of a small port are printed once a year, and for most of the people who live there they hang
on the kitchen door beside the calendar. Twice a day the water climbs the stone steps below the market, covers the
seventh step at springs and the fourth at neaps, and goes out again to leave the boats lying on their sides in the mud.
Somebody has to work out those numbers. In our town it was a teacher of mathematics, who did it with a pencil until she
bought a computer, and who then wrote a program that did in a second what had taken her the whole of November.

She kept the program short, so that anybody who came after her could check it. The height of the water is a sum of
waves. Each wave has an amplitude in metres, a speed in degrees per hour and a phase:

def height(hours, waves, mean):
    """Height of the water in metres, `hours` after midnight on the first of January."""
    total = mean
    for amplitude, speed, phase in waves:
        angle = math.radians(speed * hours - phase)
        total += amplitude * math.cos(angle)
    return total

To find high water, she looked at every minute of the day and kept those that were higher than the minute before and the
minute after:

def high_waters(day, waves, mean):
    minutes = [height(24 * day + m / 60, waves, mean) for m in range(-1, 24 * 60 + 1)]
    return [m for m in range(24 * 60) if minutes[m] < minutes[m + 1] >= minutes[m + 2]]

The largest wave belongs to the moon and returns every twelve hours and twenty-five minutes. The next belongs to the
sun. When both arrive together the tide is high; when one is up while the other is down, the steps stay dry.
'''

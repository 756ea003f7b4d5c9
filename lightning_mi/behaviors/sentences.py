"""Short sentences that are clearly favourable or not, in pairs that differ in one word."""

from __future__ import annotations

__all__ = ["SENTENCES"]

_OPINIONS = (
    ("the film was {}", "wonderful", "terrible"),
    ("the soup tasted {}", "delicious", "awful"),
    ("our guide was {} all day", "friendly", "rude"),
    ("i {} every minute of the show", "loved", "hated"),
    ("the hotel room was {}", "clean", "dirty"),
    ("this phone is {}", "great", "useless"),
    ("the story is {} from start to end", "exciting", "boring"),
    ("what a {} way to spend an evening", "lovely", "dreadful"),
    ("the actors gave a {} performance", "brilliant", "weak"),
    ("the service at this place is {}", "excellent", "poor"),
    ("my new shoes are {}", "comfortable", "painful"),
    ("the music made me feel {}", "happy", "sick"),
    ("a {} book with a clever ending", "beautiful", "stupid"),
    ("the waiter brought us a {} meal", "perfect", "cold"),
    ("the trip turned out to be a {}", "success", "disaster"),
    ("the battery is {} after a year of use", "strong", "dead"),
    ("everybody in the room was {}", "smiling", "crying"),
    ("the teacher explained it in a {} way", "clear", "confusing"),
    ("this is the {} cake in town", "best", "worst"),
    ("the garden looks {} this summer", "gorgeous", "ugly"),
    ("the staff were {} to my parents", "kind", "cruel"),
    ("the seats are {} and the sound is too", "good", "bad"),
    ("we had a {} time at the beach", "fantastic", "horrible"),
    ("the plot of this novel is {}", "original", "dull"),
    ("the repair was quick and the result is {}", "superb", "broken"),
    ("i would {} this shop to my friends", "recommend", "forbid"),
    ("the concert was a {} from beginning to end", "joy", "pain"),
    ("her new song is simply {}", "amazing", "annoying"),
    ("the coffee here is {}", "tasty", "bitter"),
    ("it was a {} idea to come here", "smart", "foolish"),
    ("the view from the window is {}", "stunning", "depressing"),
    ("the children were {} with their present", "delighted", "disappointed"),
)

SENTENCES = tuple(
    (sentence.format(word), label)
    for sentence, *words in _OPINIONS
    for word, label in zip(words, ("positive", "negative"), strict=True)
)
"""Sentences, each with its label."""

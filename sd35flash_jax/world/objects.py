"""The things: Microsoft's Fluent 3D emoji (MIT licence), each with the words that captions use for it."""

from dataclasses import dataclass

# sprite's name in Unicode | word, synonyms | plural, where it is not the word with an s
_TABLE = """
monkey face | monkey
gorilla
dog face | dog, puppy | dogs, puppies
poodle
wolf | wolf | wolves
fox | fox | foxes
raccoon
cat face | cat, kitten
lion
tiger face | tiger
leopard
horse face | horse
unicorn
zebra
deer | deer | deer
cow face | cow
pig face | pig
goat
two-hump camel | camel
llama
giraffe
elephant
rhinoceros | rhino, rhinoceros | rhinos, rhinoceroses
hippopotamus | hippo, hippopotamus | hippos, hippopotamuses
mouse face | mouse | mice
hamster
rabbit face | rabbit, bunny | rabbits, bunnies
beaver
hedgehog
bat
bear
polar bear
koala
panda
sloth
otter
skunk
kangaroo
turkey
chicken | chicken, hen
rooster
front-facing baby chick | chick
penguin
dove
eagle
duck
swan
owl
flamingo
peacock
parrot
goose | goose | geese
frog
crocodile | crocodile, alligator
turtle | turtle, tortoise
lizard
snake
dragon
T-Rex | dinosaur
spouting whale | whale
dolphin
seal
tropical fish | fish | fish
blowfish | pufferfish | pufferfish
shark
octopus | octopus | octopuses
spiral shell | shell, seashell
crab
lobster
shrimp
squid | squid | squids
snail
butterfly | butterfly | butterflies
ant
honeybee | bee, honeybee
lady beetle | ladybug, ladybird
spider
scorpion
bouquet
cherry blossom
rose
hibiscus | hibiscus | hibiscuses
sunflower
tulip
potted plant
evergreen tree | pine tree
deciduous tree | tree
palm tree
cactus | cactus | cacti
four leaf clover | clover, four leaf clover
maple leaf | maple leaf | maple leaves
mushroom
grapes | bunch of grapes | bunches of grapes
melon
watermelon
tangerine | orange, tangerine
lemon
banana
pineapple
mango | mango | mangoes
red apple
green apple
pear
peach | peach | peaches
cherries | pair of cherries | pairs of cherries
strawberry | strawberry | strawberries
kiwi fruit | kiwi
tomato | tomato | tomatoes
coconut
avocado
eggplant | eggplant, aubergine
potato | potato | potatoes
carrot
ear of corn | corn cob
hot pepper | chili, chili pepper
bell pepper
cucumber
broccoli | broccoli | broccolis
garlic | garlic bulb
onion
bread | loaf of bread | loaves of bread
croissant
baguette bread | baguette
pretzel
bagel
pancakes | stack of pancakes | stacks of pancakes
waffle
cheese wedge | piece of cheese | pieces of cheese
hamburger | hamburger, burger
french fries | box of fries | boxes of fries
pizza | slice of pizza, pizza | slices of pizza, pizzas
hot dog
sandwich | sandwich | sandwiches
taco
burrito
cooking | fried egg
popcorn | box of popcorn | boxes of popcorn
sushi | piece of sushi | pieces of sushi
rice ball
dumpling
soft ice cream | ice cream
doughnut | donut, doughnut
cookie
birthday cake
shortcake | slice of cake | slices of cake
cupcake
pie
chocolate bar
candy | candy | candies
lollipop
honey pot | pot of honey | pots of honey
glass of milk | glass of milk | glasses of milk
hot beverage | cup of coffee | cups of coffee
teapot
wine glass | glass of wine | glasses of wine
beer mug | mug of beer, beer | mugs of beer, beers
bubble tea | bubble tea
house
castle
tent
church | church | churches
ferris wheel
locomotive | steam train, train
bus | bus | buses
ambulance
fire engine | fire truck, fire engine
police car
taxi | taxi, cab
automobile | car
pickup truck
delivery truck
tractor
racing car | race car
motorcycle | motorcycle, motorbike
motor scooter | scooter
bicycle | bicycle, bike
skateboard
sailboat
canoe
speedboat
passenger ship | ship
airplane | airplane, plane
helicopter
rocket
flying saucer | flying saucer, UFO
parachute
anchor
alarm clock
hourglass done | hourglass | hourglasses
watch | wristwatch | wristwatches
volcano | volcano | volcanoes
umbrella
glowing star | star
sun with face | sun
crescent moon | moon
cloud
snowman
fire | flame
jack-o-lantern | pumpkin
Christmas tree
balloon
wrapped gift | gift, present
trophy | trophy | trophies
sports medal | medal
soccer ball | soccer ball, football
baseball
basketball
volleyball
american football | rugby ball
pool 8 ball | billiard ball
boxing glove
kite
game die | die | dice
teddy bear
crystal ball
puzzle piece
bullseye | target, dartboard
mirror ball | disco ball
yarn | ball of yarn | balls of yarn
video game | game controller
artist palette | palette
piñata | pinata
sunglasses | pair of sunglasses | pairs of sunglasses
necktie | tie, necktie
t-shirt
jeans | pair of jeans | pairs of jeans
coat
socks | pair of socks | pairs of socks
dress | dress | dresses
handbag
backpack
running shoe | sneaker, running shoe
hiking boot | boot
high-heeled shoe | high heel
crown
top hat
lipstick
ring
gem stone | diamond
bell
microphone
headphone | pair of headphones | pairs of headphones
radio
saxophone | saxophone | saxophones
trumpet
accordion
guitar
violin
drum
telephone
laptop
printer
camera
television | television, TV
magnifying glass tilted left | magnifying glass | magnifying glasses
candle
light bulb | light bulb, lamp
closed book | book
scroll
money bag
envelope
package | box, package | boxes, packages
pencil
paintbrush | paintbrush | paintbrushes
scissors | pair of scissors | pairs of scissors
key
hammer
axe
bomb
shield
wrench | wrench, spanner | wrenches, spanners
gear
magnet
ladder
microscope
telescope
door
bed
chair
toilet
broom
basket
bucket
soap | bar of soap | bars of soap
toothbrush | toothbrush | toothbrushes
fire extinguisher
shopping cart
grinning face | smiley, happy face
crying face | crying face, sad face
enraged face | angry face
smiling face with sunglasses | cool face
sleeping face
cowboy hat face | cowboy
clown face | clown
ghost
alien
robot
skull
red heart | heart
"""


@dataclass(frozen=True)
class Thing:
    """A thing that can be drawn. `words` and `plurals` belong together; the first is its name."""

    sprite: str
    words: tuple[str, ...]
    plurals: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.words[0]


def _parse(line: str) -> Thing:
    sprite, *rest = (part.strip() for part in line.split("|"))
    words = tuple(word.strip() for word in rest[0].split(",")) if rest else (sprite,)
    plurals = tuple(word.strip() for word in rest[1].split(",")) if len(rest) > 1 else tuple(f"{w}s" for w in words)
    return Thing(sprite, words, plurals)


THINGS: tuple[Thing, ...] = tuple(_parse(line) for line in _TABLE.strip().splitlines())
"""Every thing, in the order of the sprites' atlas."""

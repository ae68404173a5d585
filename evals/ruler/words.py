"""Common English words of at most eight letters for keys, values and lists; none is in two of these."""

from __future__ import annotations

__all__ = ["ADJECTIVES", "NOUNS", "VERBS"]

_ADJECTIVES = """
able abrupt absent abundant active acute agile alert alive amber ample ancient angry apt arctic ardent arid
ashen astute autumn awake aware bare basic beige big bitter bland blank bleak blind blond blunt bold brave
brazen brief bright brisk brittle broad broken bronze brown burly busy calm candid careful casual cheap
cheerful chief chilly civil classic clean clear clever close cloudy clumsy coarse cold common compact
complex cool coral covert cozy crafty crimson crisp crooked crude cruel cubic curious curly current curved
damp dapper daring dark dear decent deep deft dense devout dim direct distant divine docile double dreary
dry dual dull durable dusky dusty eager early earnest eastern easy edible elastic elder elegant eminent
empty endless entire equal eternal even exact exotic expert express extra fabled faint fair faithful famous
fancy fast feeble fertile fervent festive few fierce fiery final fine firm fit fixed flat fleet flexible
fluent fluffy fluid foggy fond foolish foreign formal former forward fragile frail frank free frequent fresh
friendly frigid frosty frozen frugal full funny fuzzy gallant general generous gentle genuine giant giddy
gifted glad glassy gleaming gloomy glossy golden good graceful gracious grand grateful grave gray great
greedy green grim gritty gruff guilty handsome handy happy hard hardy harsh hasty hazy healthy hearty heavy
helpful hidden high hoarse hollow holy honest horrid hot huge humane humble humid hungry hushed husky icy
ideal idle immense inner intact intense intent ivory jagged jaunty jealous joint jolly jovial joyful
jubilant junior keen kind kindly known lame large lasting late lavish lawful lazy leafy lean learned legal
level light likely limber limp linear liquid literal little lively local lofty lone lonely long loose lost
loud lovely loyal lucid lucky lunar lush magenta main major mammoth mature meager mellow merry messy mighty
mild minor minute misty mixed mobile modern modest moist moral mossy mute muted narrow native natural naval
neat nervous neutral new nice nimble noble noisy northern notable novel numb nutty oaken oblong obscure odd
official old olive open opposite orange orderly ornate outer oval overt pale paper partial past patient
peaceful perfect plaid plain playful pleasant plump plush poetic polar polite poor popular portable potent
precious precise pretty primary prime private prompt proper proud prudent public pure purple quaint quick
quiet radiant rainy rapid rare rash raw ready real rear recent red regal regular remote restless rich rigid
ripe robust rocky roomy rosy rough round royal rubber ruby rude rugged rural russet rustic rusty sacred sad
safe salty sandy sane satin savory scarce scarlet secret secure sedate senior serene serious severe shabby
shady shallow sharp sheer shiny short shrewd shrill shy silent silken silky silly silver simple sincere
single skilled sleek sleepy sleety slender slight slim slow sly small smart smoky smooth snowy snug sober
social soft solar sole solemn solid somber sonic sore sound sour southern spare sparse special spicy spiral
splendid square stable stale standard stark static steady steep sterile stern sticky stiff still stormy
stout strange strict strong sturdy subtle sudden sugary sullen sunny superb supple sure sweet swift tall
tame tan tangy tart tasty teal tender tense tepid terse thick thin thirsty thorny thrifty tidal tidy tight
timely timid tiny tired topical total tough tranquil tricky trim tropical true trusty twin typical ultimate
unique united unusual upper upright urban urgent useful usual vacant vague valid valuable vast velvet verbal
vibrant violet visible visual vital vivid vocal volatile warm wary watery wavy weak wealthy weary weekly
western wet whole wicked wide wild willing wily windy winged wintry wise wistful witty wooden woolen worldly
worn worthy woven yearly yellow young zealous zesty
"""
_NOUNS = """
abbey access account acorn acre action actor address admiral advice affair agency agent aim air airport
aisle alarm album alcove alley alloy almanac almond alpine altar amount anchor angle animal ankle answer ant
antler anvil apple apron arbor arcade arch area arena argument arm armor army aroma arrival arrow article
artist ashtray aspen atlas atom attic auction audience author avenue award axis axle badge badger bag bagel
baker balance balcony ball ballad balloon bamboo banana band bandit banjo bank banker banner banquet barber
bard bargain barge bark barley barn baron barrel basin basket bass bath baton battery bay bazaar beach
beacon bead beak beam bean bear beard beast beaver bed bee beech beet beetle bell belt bench berry bike bird
birth biscuit bishop blade blanket blaze blossom board boat body bolt bone bonnet book boot border bottle
bottom bough boulder bow bowl box boy bracelet brain branch brass bread breeze brick bridge brook broom
broth brother bruise brush bubble bucket buckle bud budget buffalo bugle builder bulb bullet bunch bundle
burrow bus bush butcher butler butter button cabbage cabin cabinet cable cactus cage cake calendar calf
camel camera camp canal canary candle candy cane cannon canoe canopy canvas canyon cap cape captain car
caravan carbon card cargo carpet carriage carrot cart cartoon case cash castle cat catalog cattle cause cave
cedar ceiling cell cellar cello cement century ceramic cereal chain chair chalk chamber champion chance
channel chapel chapter charcoal chariot chart charter cheek cheese chef cherry chess chest chicken child
chimney chin china chisel choir chorus church cider cinder cinema circle circuit circus citizen citrus city
clam clarinet class clause clay clerk cliff climate clinic cloak clock cloth cloud clover club clue coach
coal coast coat cobweb cocoa coconut coffee coffin coin collar college colony color column comb comet
comfort comma compass comrade concert conduct cone contest contract convoy cook cookie copper copy cord cork
corn corner corridor costume cottage cotton couch council counter country county couple courage course court
cousin cover cow cowboy crab cradle craft crane crater cream creature credit creek crescent crest crew
cricket crop cross crow crowd crown crumb crust crystal cub cube cuff culture cup curb curtain curve cushion
custom cycle cymbal dagger dairy daisy dam dance danger date daughter dawn day deal debate debt decade deck
decree deer degree delta demand den dentist depot depth deputy desert desk detail device dew diagram dial
diamond diary diet dinner disc dish district ditch diver dock doctor dog doll dollar dolphin dome domino
donkey door dot dough dove dragon drama drawer dream dress drift drill drink driver drum duchess duck duel
duet duke dune dust duty dwarf eagle ear earth easel east echo edge editor effort egg elbow election
elephant elk elm ember emblem emerald emperor empire end enemy energy engine engineer entry envelope
equation error escape essay estate evening event example exit eye fabric face fact factor factory fairy
faith falcon fame family fan farm farmer fashion father faucet favor feast feather fee fence fern ferry
fever fiber fiddle field fig figure film finch finger fire fish fist flag flame flank flannel flask flavor
flax flea fleece flight flint flock flood floor flour flower flute foam focus fog foil folder folk food foot
force forest forge fork form fort fortune forum fossil fountain fox frame freight friend frog front frost
fruit fuel funnel fur furnace future gadget galaxy gale gallery gallon game gander gap garage garden garlic
garment garnet gas gate gazelle gem genius germ ghost ginger giraffe girl glacier glass glaze globe glory
glove glue goal goat goblet gold golf goose gorge gospel gown grace grain granite grape graph grass gravel
gravity grease grid grill grocer groove ground group grove growth guard guest guide guild guitar gulf gull
gum gust guy gym habit hail hair half hall halo hamlet hammer hammock hand handle harbor hare harness harp
harvest hat hatch haven hawk hay hazard hazel head health heart hearth heat heaven hedge heel height heir
helm helmet help hen herald herb herd heritage hero heron hill hinge history hive hockey hole holiday home
honey honor hood hoof hook hope horizon horn horse host hotel hound hour house human hunter hurdle husband
hut hymn ice idea idol igloo image impact inch income index infant ink inlet inn insect inside instinct
interest iris iron island issue item ivy jacket jade jaguar jail jam jar jasmine jaw jay jelly jewel job
jockey journal journey joy judge jug juice jungle jury justice kayak kennel kernel kettle key keyboard
kidney king kitchen kite kitten knee knife knight knot label labor lace ladder lady lagoon lake lamb lamp
lance land landing lane language lantern lap lark laser lather laundry laurel lava law lawn lawyer layer
lead leader leaf league leather lecture ledge legend lemon lens lentil leopard lesson letter lever liberty
library lid life lighter lily limb lime limit line linen link lion lip list lizard llama load loaf lobby
lobster lock locket locust lodge log logic loom loop lord lotus lounge love lumber lunch lute lynx lyric
machine magnet maid mail mallet mammal man mane mango manner manor mantle map maple marble march margin
market marsh mask mason mast master mat match math matter mayor maze meadow meal measure meat medal medicine
melody melon member memory menu merchant mercury mercy merit message metal meteor meter method midnight mile
milk mill miller mind mineral minnow mint miracle mirror mission mist mitten mixture moat model moment
monarch money monk monkey monster month mood moon moose morning mosaic moss moth mother motion motor mound
mountain mouse mouth movie mud mule muscle museum music mustard myth nail name napkin nation nature neck
needle nephew nerve nest net nettle network newt nickel niece night noise noodle noon north nose notch note
notebook notion number nurse nut nylon oak oar oasis oat object oboe ocean octave octopus office officer oil
onion opal opera opinion orbit orchard orchid order organ origin osprey ostrich otter oven owl owner ox
oxygen oyster pace pack paddle page pail pain painter pair palace palm pan panda panel panther papaya parade
parcel parent park parlor parrot parsley part partner party passage pasta paste pastry pasture patch path
patrol pattern paw payment pea peace peach peacock peak peanut pear pearl pebble pedal pelican pen pencil
pendant penguin people pepper perch perfume period permit person petal phone photo phrase piano picnic
picture pie piece pier pig pigeon pile pill pillar pillow pilot pin pine pioneer pipe pirate pistol pitch
pizza place plan plane planet plank plant plaster plate platform player plaza plot plow plum plumber pocket
poem poet point poker pole police policy pollen polo pond pony pool porch port porter portrait post postage
pot potato potter pottery pouch powder power prairie prayer present price pride priest prince print prison
prize problem process product profit program project promise proof prophet prose puddle pulley pulse pump
pumpkin puppet puppy purse puzzle pyramid quail quality quarry quart quartz queen question quilt quiver
rabbit raccoon race radar radio radish raft rail rain rainbow ram ranch range ranger rapids raven ray razor
reason rebel recipe record reef refuge region reindeer relic remedy rent report reptile rescue resin resort
result review reward rhyme rhythm rib ribbon rice rider ridge rifle rim ring river road robe robin robot
rock rocket rod role roof room root rope rose route row rudder rug ruin ruler rumor saddle safety saga sage
sail sailor saint salad salmon salon salt sand sandal sapphire satchel sauce saucer sausage saw scale scarf
scene scholar school science scissors scooter score scout screen screw script scroll sea seal season seat
second sector seed senate sense sentence sequel sermon servant session shade shadow shaft shape share shark
shawl shed sheep sheet shelf shell shelter shepherd shield ship shirt shoe shop shore shoulder shovel show
shower shrimp shrub shuttle sick side siege sign signal silence silk sink sister skate skill skin skirt
skull sky slate sled sleeve slope smile smith smoke snack snail snake snow soap soccer society sock soda
sofa soil soldier son song soul soup source south space spade spark sparrow speaker spear species speech
speed sphere spice spider spine spirit sponge spool spoon sport spot spring spruce spy squad squash squire
squirrel stadium staff stage stair stamp star state statue steam steel stem step steward stick stitch stock
stomach stone stool store storm story stove stranger straw stream street string student studio study subject
suburb subway success sugar suit summer summit sun supper surface surgeon swamp swan symbol symphony syrup
system table tablet tack tail tailor tale talent tank tape target taste tavern tax taxi tea teacher team
tear temper temple tennis tent term terrace test text theater theme theory thicket thief thimble thing
thistle thorn thread throat throne thumb thunder ticket tide tie tiger tile timber time tin tissue title
toad toast toe token tomato tongue tool tooth topic torch tower town toy track tractor trade trail train
tray treaty tree tribe trick trip trophy trouble trout truck trumpet trunk trust truth tub tube tulip tuna
tundra tunic tunnel turban turkey turnip turtle tutor twig umbrella uncle union unit universe valley value
valve van vanilla vapor vase vault veil vein vendor venture verb verse vessel vest veteran victory video
view village vine vinegar violin virtue vision visitor voice volcano volume voyage wage wagon waist waiter
walker wall wallet walnut walrus waltz warden wasp watch water wave wax way weapon weather weaver web
wedding week weight well whale wharf wheat wheel whip whisker whistle widow wife willow wind window wine
wing winner winter wire wisdom wish witch witness wizard wolf woman wood wool word work worker world worm
wreath wren wrench wrist writer yacht yard yarn year yeast yogurt zebra zenith zinc zipper zone
"""
_VERBS = """
absorb accept achieve acquire adapt adjust admire admit adopt advance advise afford agree allow amuse
announce annoy appear applaud apply approve argue arise arrange arrest arrive ascend ask assemble assist
assume assure attach attack attain attempt attend attract avoid awaken babble bake banish bathe become beg
begin behave belong bend besiege bestow betray bind bite bleed bless blink blow boast boil borrow bounce
breathe breed bring build burn burst bury buy call capture carry carve catch change chase chat cheer chew
choose chop claim clap clasp climb cling collect combine come command commit compare compete complain
compose conceal conclude confess confuse connect conquer consider consist consult contain continue convert
convince correct cough count crash crawl create creep cry cure cut dare decay deceive decide declare decline
decorate defeat defend define delay delight deliver deny depart depend describe deserve design destroy
develop devour differ dig disagree discover discuss dislike dissolve divide dodge donate doubt drag draw
drop drown earn eat educate elect embark embrace emerge employ enable endure engage enjoy enlarge enter
erase erect erupt evade examine exceed excite excuse exist expand expect explain explode explore extend fade
fail fall fasten feed feel fetch fight fill find finish flatter flee fling float flow fly fold follow forbid
forget forgive freeze frighten fry gain gallop gather gaze get giggle give glide glow go govern grab greet
grind grip groan grow growl guess halt hang happen hasten hate haul heal hear heed hesitate hide hiss hit
hold hop hover howl hug hum hunt hurl hurry ignore imagine imitate imply improve include increase inform
inherit injure inspect inspire insult intend invade invent invite jog join joke juggle jump keep kick kill
kindle kneel knit knock know last laugh launch lay leap learn leave lend lick lie lift linger listen live
look lose lower make manage mark marry meet melt mend mention merge mingle mix moan mock motivate mourn move
mumble mutter navigate need neglect nibble nod notice obey observe obtain occupy occur offer oppose overcome
owe paint pardon pause pay peel peep perform perish persuade pick pierce pinch plead please pledge plunge
ponder possess postpone pounce pour praise pray preach prefer prepare preserve pretend prevent proceed
produce promote propose protect protest prove provide publish pull punish pursue push quarrel quit quote
raise reach react read realize reap rebuild recall receive recite recover reduce refer reflect refuse regret
reject relate relax release rely remain remember remind remove rend repair repeat replace reply request
require resemble resist resolve respond restore retain retire retreat retrieve return reveal revive revolve
ride rinse rise rival roam roar roll rotate rub run rush satisfy save say scatter scold scorch scrape
scratch scream scrub seek seem seize select sell send separate serve settle sew shake shatter shave shine
shiver shoot shout shrink shrug shut sigh sing sip sit sketch skip slam slap sleep slice slide slip smash
smell snatch sneeze sniff snore soak solve soothe sort sparkle speak spell spend spill spin splash split
spoil spread sprinkle squeak squeeze stagger stain stand stare start starve stay steal steer sting stir stop
stray stretch stride strike strip strive struggle stumble submit succeed suck suffer suggest supply support
suppose surprise surround survive suspect swallow swear sweep swell swim swing switch take talk tap teach
tease tell tempt thank think thrive throw tickle tilt toss touch tow trace transfer transmit travel tread
treat tremble trot try tug tumble turn twist undo unfold unite unlock unpack untie urge use utter vanish
vary wade wait wake walk wander want warn wash waste wear weave weep weigh welcome whisper win wink wipe
withdraw wonder worry worship wrap wrestle wriggle write yawn yearn yell yield
"""
ADJECTIVES, NOUNS, VERBS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split()), tuple(_VERBS.split())
